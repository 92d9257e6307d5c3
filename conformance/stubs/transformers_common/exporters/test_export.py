"""Stands in for a file that the source distribution lacks: its tests of torch.export are not run."""


class ExportTesterMixin: ...
