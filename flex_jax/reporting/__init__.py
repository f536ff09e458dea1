"""Reporting: metrics lines, JSON files, text tables, plots and the report page."""
