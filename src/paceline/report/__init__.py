"""Turn JSON into tables, plots and pages."""
