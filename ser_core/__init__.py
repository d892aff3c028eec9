"""Speech emotion recognition: corpora, models, training, metrics. Knows nothing of clusters."""
