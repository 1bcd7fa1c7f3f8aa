"""How many helpers a machine has room for."""

from floatline.plan import room


def test_one_core_or_little_memory_has_none(monkeypatch):
    monkeypatch.setattr(room, "available_memory", lambda: 64 * 2**30)
    for cores, expected in ((1, 0), (2, 1), (4, 3), (64, 3)):
        monkeypatch.setattr(room, "_cores", lambda cores=cores: cores)
        assert room.room() == expected
    for gib, expected in ((1, 0), (5, 0), (6, 1), (8, 2), (64, 3)):
        monkeypatch.setattr(room, "available_memory", lambda gib=gib: gib * 2**30)
        assert room.room() == expected


def test_what_a_container_may_use_counts(monkeypatch):
    files = {
        "/sys/fs/cgroup/cpu.max": "150000 100000\n",
        "/sys/fs/cgroup/memory.max": f"{8 * 2**30}\n",
        "/sys/fs/cgroup/memory.current": f"{3 * 2**30}\n",
        "/proc/meminfo": "MemAvailable: 67108864 kB\n",
    }
    monkeypatch.setattr(room, "_read", lambda path: files.get(path, ""))
    assert room._cores() == 1 and room.available_memory() == 5 * 2**30
    files["/sys/fs/cgroup/cpu.max"], files["/sys/fs/cgroup/memory.max"] = "max 100000\n", "max\n"
    assert room._cores() >= 1 and room.available_memory() == 64 * 2**30
    files.clear()
    assert room.available_memory() > 2**39  # nothing is told: plenty is assumed
