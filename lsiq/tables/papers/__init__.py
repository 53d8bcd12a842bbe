"""The tables and figures of docs/tables, each made from records."""
