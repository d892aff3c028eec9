"""Speech emotion recognition: corpora, models, training, metrics. Independent of Slurm and of `jobs`."""
