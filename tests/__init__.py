"""The tests, and what they share: imported by full names, tests.helpers and tests.ops."""
