"""Charts, pictures and the HTML page of an evaluation."""
