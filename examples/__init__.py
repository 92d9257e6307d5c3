"""Scripts that convert, fine-tune, save, load and merge, one for each task; offline, on tiny models."""
