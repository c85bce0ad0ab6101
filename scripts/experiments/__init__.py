"""What settings are worth, tried on the toy base: which runs, how they are judged, the page."""
