"""How a task is learned: by gradient steps, by a Gaussian head in closed form, or both."""
