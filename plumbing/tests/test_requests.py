"""What is asked of one request."""
from generate import Engine


def test_a_setting_out_of_range_fails_alone(model):
    engine, bad = Engine(model, slots=2), []
    before = engine.submit([1, 2])
    for setting, value in [
            ("max_new_tokens", 0), ("seed", 10**20), ("seed", -1), ("top_k", 10**20), ("top_k", -1),
            ("temperature", 10**400), ("temperature", float("nan")), ("temperature", float("inf")),
            ("top_p", 0.0), ("top_p", float("nan"))]:
        bad.append((setting, engine.submit([1, 2], **{setting: value})))
    after = engine.submit([3], temperature=1.0)
    engine.run()
    for setting, request in bad:
        assert request.state == "failed" and setting in request.error and request.ids == []
        assert len(request.error) < 200
    assert before.state == after.state == "done" and len(after.ids) == 63
