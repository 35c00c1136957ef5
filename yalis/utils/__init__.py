"""Helpers without a home of their own: logging, environment variables, machine record, native builds."""
