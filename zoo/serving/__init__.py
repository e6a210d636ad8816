"""Predictors and exported files, made from a checkpoint alone.

Like the command line, this room puts modules and data together, and so imports both.
"""
