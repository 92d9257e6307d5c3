"""From folder to folder: finding, loading, converting, merging and saving models on disk."""
