"""The report on a data set: for a console, as JSON and as a page."""
