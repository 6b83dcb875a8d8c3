"""The one place that says which version this is: the wheel, `package.json` and reports read it here."""

VERSION = "0.1.0"
