"""What Transformers loads, runs and saves: configurations, classes, names, the front door."""
