"""From scores to what a person reads: the summary, figures, thumbnails and the page."""
