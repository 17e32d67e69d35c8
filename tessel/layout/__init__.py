"""Who owns which slice of what: pure arithmetic, without torch and without processes."""
