from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["gkd_fast", "gkd_fast.*"]) + ["gkd_fast.kernels"],
    package_dir={"gkd_fast": "gkd_fast", "gkd_fast.kernels": "kernels"},
)
