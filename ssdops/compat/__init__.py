"""Functions with the names, arguments and layouts of other packages, each a thin translation to `ssd` or `ssd_step`.

`ssdops.compat.mamba_ssm` and `ssdops.compat.fla`: change the import, keep the call. Neither needs the package that it is named
for.
"""
