"""Results on disk: folders, records, attempts and their claims, failure classes."""
