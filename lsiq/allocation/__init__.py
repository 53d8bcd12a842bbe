"""Bits where they count: sensitivities of linears, an exact choice of formats for them, and the plan that says so."""
