"""Every private or undocumented name of Transformers, accelerate and PEFT that the package uses, and no other module's.

It lies at the root, below `layers`, because structures and layers need it as well as models do. What the names are for
is said by functions and classes with plain names. For each name tests/test_compat.py has a test that fails, in one
sentence, when the library no longer has it, or no longer calls or reads it.
"""
