"""Number formats: how a weight or an activation is put on a grid."""
