"""Everything static is in pyproject.toml; setuptools takes the native module only from here."""

from setuptools import setup

setup(cffi_modules=["native/build.py:ffibuilder"])
