"""Time in tests: told so that it does not depend on what else the machine does."""

import os
import signal
import threading
import time

#: Seconds after which a test gives up waiting for another thread or process, which only a defect makes necessary. A process
#: whose own parts wait so long gets twice as many.
PATIENCE = 120.0
#: Less than that of the processor's time lies between a signal and what its handler raises.
PROMISED = 0.5


def late(call, error=KeyboardInterrupt, number=signal.SIGINT, after=0.2, begun=lambda: True):
    """Send a signal into `call`, made again and again on the main thread until `error` comes out of it; how long that took.
    It is sent when the call has worked for `after` seconds, or waited for ten times as many, since it has `begun`.

    Told in seconds of that thread's processor time. Some machines count what others take away as well: the least of three tries,
    if the first ones are late.
    """
    took = PROMISED
    for _ in range(3):
        took = min(took, _late(call, error, number, after, begun))
        if took < PROMISED:
            break
    return took


def _late(call, error, number, after, begun):
    main = threading.main_thread().ident
    now = lambda: time.clock_gettime(time.pthread_getcpuclockid(main))  # noqa: E731
    sent = []

    def send():
        while not begun():
            time.sleep(0.001)
        # Until the call is well under way, or waits for others.
        start, end = now(), time.monotonic() + 10 * after
        while now() - start < after and time.monotonic() < end:
            time.sleep(0.01)
        sent.append(now())
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    try:
        sender.start()
        while True:
            call()
    except error:
        took = now() - sent[0]
    sender.join()
    return took
