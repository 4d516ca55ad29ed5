"""The activation of a transformer's feed-forward layers."""
