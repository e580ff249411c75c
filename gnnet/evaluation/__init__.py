"""Metrics, tables and figures of localization results."""
