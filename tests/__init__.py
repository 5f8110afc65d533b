"""Tests of fastmeta; ``tests.oracle`` is the truth they and the benchmarks compare with."""
