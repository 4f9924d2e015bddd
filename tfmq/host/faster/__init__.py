"""Parts of a MODEL around its leaves that run faster: norms, feed-forward networks, attention, float type."""
