"""Small convolutional networks over a batch of tasks, each task with weights of its own."""
