def test_adapter(calora_adapter):
    assert not calora_adapter.problems


def test_everything_else(calora_report):
    assert calora_report.passed, calora_report.problems
