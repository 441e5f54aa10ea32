"""The benchmark of scaling compares jobs that train alike."""
import scaling as benchmark


def test_jobs_differ_in_their_devices_alone():
    one, two = (benchmark.command(job, 32, 'out') for job in ('1 worker', '2 workers'))
    assert one[2:4] == ['-n', '1'] and two[2:4] == ['-n', '2']
    assert one[4:] == two[4:] and one[-2:] == ['--batch-size', '32']
    assert benchmark.command('2 contexts', 32, 'out')[-4:] == ['--num-cpus', '2', '--batch-size', '64']
