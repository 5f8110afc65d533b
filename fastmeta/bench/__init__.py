"""Microbenchmarks: timing by turns, ceilings measured on the spot, every operation's maps, reports, regressions."""
