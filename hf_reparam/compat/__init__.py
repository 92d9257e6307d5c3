"""Every private or undocumented name of Transformers, accelerate and PEFT that the package uses, and no other module's.

For each name tests/test_compat.py has a test that fails, in one sentence, when the library no longer has it, or no
longer calls or reads it.
"""
