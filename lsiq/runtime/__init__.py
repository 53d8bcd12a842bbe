"""Where a run happens: processes, devices, memory, files, locks and the terminal. It knows no models."""
