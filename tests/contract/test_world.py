"""The seed scenario, fast."""

from tests.lightbox import Lightbox, World


async def test_the_order_shows_its_study(lightbox: Lightbox, world: World) -> None:
    order = await lightbox.must("clinician", "GET", f"/orders/{world.my_order['id']}")
    assert order["study_instance_uid"] == world.my_study


async def test_another_clinician_sees_nothing(lightbox: Lightbox, world: World) -> None:
    answer = await lightbox.ask(
        "clinician", "GET", f"/api/v1/orders/{world.my_order['id']}", sub="x"
    )
    assert answer.status_code == 403
