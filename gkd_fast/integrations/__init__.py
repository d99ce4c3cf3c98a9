"""gkd_fast in other training frameworks, a module for each, imported only by name."""
