"""What people read about scores: the summary, figures, thumbnails and the HTML page."""
