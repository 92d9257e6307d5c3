"""A census: every model class of the installed Transformers that can be built tiny, there and back."""
