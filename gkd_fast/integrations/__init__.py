"""Adapters to training libraries; each module needs its own package."""
