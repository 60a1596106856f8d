"""Other ways to predict for a new task from a few rows, for `compare_baselines`.

Every class here learns what it can from the training tasks (`fit`) and predicts the query rows of
held-out tasks from their support rows (`predict`). Features, and targets in regression, come
standardised with the statistics of the training tasks; labels are positions 0, 1, ... and their
predictions are probabilities.

What they have in common is in `base`, their names are in `registry`. scikit-learn's ensembles and
processes take long to import and nothing else needs them, so nothing is imported here.
"""
