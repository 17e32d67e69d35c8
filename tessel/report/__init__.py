"""What a folder, a dataset, a machine or a run is: the verbs that only look."""
