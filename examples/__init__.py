"""Scripts that fine-tune, convert, save, load and merge, one for each task;
offline, on tiny models."""
