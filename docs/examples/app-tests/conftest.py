pytest_plugins = ["calora_export.testing"]
