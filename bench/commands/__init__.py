"""The subcommands of ``python -m bench``, a module each: the top layer, which nothing below imports."""
