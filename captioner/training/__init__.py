"""From a feature store to a model directory, on Ray Train."""
