"""Raw demonstrations, whatever their format on disk."""
