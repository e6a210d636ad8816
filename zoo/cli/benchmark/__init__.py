"""``zoo benchmark``: how fast a recipe trains and predicts here, what limits it, and how others do on the same.

``cells.py`` varies the axes and starts a process for each cell; ``process.py`` is what runs in it, ``measure.py`` what
it measures, ``clock.py`` how; ``peers.py`` are the others, ``peaks.py`` what devices can do at most, and ``report.py``
the table, the plot and the comparison of two benchmarks.
"""
