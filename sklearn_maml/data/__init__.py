"""Task collections, how callers spell them, and the episodes drawn from them."""
