"""Stands in for a file that the source distribution lacks: its tests of generation are not run."""


class GenerationTesterMixin: ...
