"""Reporting: text tables, plots and the report page."""
